"""What a file is, before it may be served: headers read with bounds, and a trial in a child process."""
