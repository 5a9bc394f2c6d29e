"""The life of mounts, as the daemon sees it: begun, found again, brought back, ended."""
