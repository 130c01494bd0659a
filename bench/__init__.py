"""What scoring costs, against plain passes and against other attribution libraries.

Run ``make bench``; ``bench/README.md`` has the last results and says how to read them.
"""
