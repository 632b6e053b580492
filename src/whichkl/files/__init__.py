"""Files: what is written, locked and read back, with every checksum checked; sample files are read by `samples`."""
