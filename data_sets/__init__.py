"""Image and table sets: their files, checksums and downloads."""
