"""One module a stage: each reads its parents' artifacts, loops, and writes its own."""
