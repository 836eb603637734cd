"""One loader a file, and the protocols that split what they load (`splits`)."""
