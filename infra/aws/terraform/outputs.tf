output "cluster_name" {
  description = "For `aws eks update-kubeconfig --name`."
  value       = aws_eks_cluster.this.name
}

output "weights_role_arn" {
  description = "For the service account's annotation in infra/kubernetes/overlays."
  value       = aws_iam_role.weights.arn
}

output "usage_file_system_id" {
  description = "For the storage class `efs`, which the claim of the usage ledger names; see docs/operations.md."
  value       = aws_efs_file_system.usage.id
}
