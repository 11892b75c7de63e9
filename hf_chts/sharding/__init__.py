"""The only room that knows how an engine holds weights, moments and ranks.

`detect.engine_of` finds the engine of a run, and all engines answer the same few questions (interface.py): what is the
whole weight of a layer, where must zeros go when its topology changes, what would its gradient be without the mask.
"""
