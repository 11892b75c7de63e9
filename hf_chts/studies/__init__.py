"""Studies: the same training run under many settings and seeds, from one YAML file.

A study names a task, settings, rows (settings that differ) and seeds. `study.py` reads it, `running.py` runs what is
missing, each run in a process of its own, `page.py` makes tables and curves of what came out. What a run trains is a
task: see `tasks.py`.
"""
