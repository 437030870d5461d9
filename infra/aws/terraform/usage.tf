# The usage ledger's file system: ingresses of all nodes write it, so it is NFS, by Amazon's EFS driver.

resource "aws_efs_file_system" "usage" {
  encrypted = true
  tags      = { Name = "${var.name}-usage" }
}

resource "aws_security_group" "usage" {
  name   = "${var.name}-usage"
  vpc_id = aws_vpc.this.id

  ingress {
    description     = "NFS, from the nodes"
    protocol        = "tcp"
    from_port       = 2049
    to_port         = 2049
    security_groups = [aws_eks_cluster.this.vpc_config[0].cluster_security_group_id]
  }
}

resource "aws_efs_mount_target" "usage" {
  count           = length(local.zones)
  file_system_id  = aws_efs_file_system.usage.id
  subnet_id       = aws_subnet.private[count.index].id
  security_groups = [aws_security_group.usage.id]
}

resource "aws_iam_role" "efs_driver" {
  name               = "${var.name}-efs-driver"
  assume_role_policy = data.aws_iam_policy_document.pods_assume["efs_driver"].json
}

resource "aws_iam_role_policy_attachment" "efs_driver" {
  role       = aws_iam_role.efs_driver.name
  policy_arn = "arn:aws:iam::aws:policy/service-role/AmazonEFSCSIDriverPolicy"
}

resource "aws_eks_addon" "efs_driver" {
  cluster_name             = aws_eks_cluster.this.name
  addon_name               = "aws-efs-csi-driver"
  service_account_role_arn = aws_iam_role.efs_driver.arn
  depends_on               = [aws_eks_node_group.this, aws_iam_role_policy_attachment.efs_driver]
}
