"""Observers of a run: they are told what happened and change nothing.

Order (rank 0 only): the metrics file first, so a tracker that fails loses nothing; then the tracker; the screen; the report last, when all
others have closed what they write.
"""
