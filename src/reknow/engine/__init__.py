"""Who does the tasks of a work: this process, others of this machine, or a cluster."""
