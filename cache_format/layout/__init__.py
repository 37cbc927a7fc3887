"""What lies in a cache: documents and what they say, rows of arrays, and which of them count.

All of it needs numpy, so nothing is imported here: other rooms import the modules.
"""
