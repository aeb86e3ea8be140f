"""The Helm chart as it is rendered, without a cluster."""
