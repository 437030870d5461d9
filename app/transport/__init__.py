"""The socket between a replica and an ingress: authenticated, versioned, bounded. Knows no Ray but for one file."""
