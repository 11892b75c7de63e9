"""What a run writes down about its topology, for the report and for other readers; training never reads it."""
