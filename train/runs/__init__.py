"""What a fit leaves behind: its folder, and what a run says of new texts."""
