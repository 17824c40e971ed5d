"""What a saved file is made of: plain values, a checksum, written whole or not at all."""
