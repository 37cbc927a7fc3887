"""What all three packages need and none owns."""
