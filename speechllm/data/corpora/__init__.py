"""Corpora in the folder layouts that they are distributed in, as rows of the schema.

A corpus function takes the corpus's folder and options that are texts, and yields rows; what it finds amiss it yields as
`SetAside`. Whether audio files exist, transcripts are empty and ids are unique is checked for all of them in
`checking.py`. `docs/data.md` lists the functions with their options.
"""
