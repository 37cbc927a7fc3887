"""What makes a pass fast, each with a plain way beside it. Knows torch and nothing of ours."""
