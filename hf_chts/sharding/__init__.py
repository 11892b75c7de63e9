"""The only room that knows how an engine holds weights, moments and ranks.

`detect.engine_of` finds the engine of a run, and all engines answer the same few questions (interface.py): where are
the bytes of a layer's weight, what is the whole weight, what would its gradient be without the mask.
"""
