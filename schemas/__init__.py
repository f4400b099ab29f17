"""What every stage agrees on: rows and their Parquet form, configs, counts, storage and errors.

This is the leftmost package of the line schemas -> curation -> training -> inference -> flows:
it imports none of the others, and only pydantic, pyarrow and PyYAML besides the standard library.
"""
