"""Inner parts of `rdp.distributed`."""
