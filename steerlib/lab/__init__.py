"""What notebooks need: data and settings in, figures, tables and panels out.

`datasets` and `settings` say what is run, `plots`, `tables` and `panels` show it, `provenance`
writes figures with their origin, `judges` gives second opinions. Of this package, only this room
imports matplotlib or ipywidgets. Nothing below imports from here.
"""
