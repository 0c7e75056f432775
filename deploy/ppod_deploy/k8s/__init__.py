"""`ppod k8s`: the same system on a Kubernetes cluster."""
