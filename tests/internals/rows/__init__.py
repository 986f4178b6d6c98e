"""Inner parts of `rdp.rows`."""
