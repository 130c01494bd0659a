"""From a study to stages with identities. Imports neither torch nor Snakemake."""
