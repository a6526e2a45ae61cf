"""What each operator means: one file each."""
