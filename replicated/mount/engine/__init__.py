"""What speaks to the kernel for a mount: one engine of our own, and two over libfuse."""
