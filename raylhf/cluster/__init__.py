"""Ray: the only importer of ray. Plain worker classes become actors here, and nowhere else."""
