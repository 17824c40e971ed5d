"""What a saved file is made of: remembered arguments, plain values, a checksum, written whole or
not at all.
"""
