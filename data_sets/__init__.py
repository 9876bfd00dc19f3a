"""Sets of images and tables: their files, checksums and downloads, and views of images."""
