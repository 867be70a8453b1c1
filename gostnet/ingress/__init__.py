"""What the kernel feeds into the pipeline: redirected and tproxied connections and datagrams."""
