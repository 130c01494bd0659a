"""What the papers print, table by table, and which runs of a study stand beside it."""
