"""Training of students: losses, stages, and the loop they run in."""
