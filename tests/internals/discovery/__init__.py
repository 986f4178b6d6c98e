"""Inner parts of `rdp.discovery`."""
