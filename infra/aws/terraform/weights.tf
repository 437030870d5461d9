# Who may read the weights: the service account of Quire's pods (IRSA), and no node.

data "aws_s3_bucket" "weights" {
  bucket = var.weights_bucket
}

data "aws_iam_policy_document" "read_weights" {
  statement {
    actions   = ["s3:ListBucket"]
    resources = [data.aws_s3_bucket.weights.arn]
  }

  statement {
    actions   = ["s3:GetObject"]
    resources = ["${data.aws_s3_bucket.weights.arn}/*"]
  }
}

resource "aws_iam_policy" "read_weights" {
  name   = "${var.name}-read-weights"
  policy = data.aws_iam_policy_document.read_weights.json
}

resource "aws_iam_openid_connect_provider" "eks" {
  url            = aws_eks_cluster.this.identity[0].oidc[0].issuer
  client_id_list = ["sts.amazonaws.com"]
}

locals {
  issuer = replace(aws_eks_cluster.this.identity[0].oidc[0].issuer, "https://", "")
  # Role → namespace and name of the service account that may take it on.
  service_accounts = {
    weights    = "${var.namespace}:quire"
    efs_driver = "kube-system:efs-csi-controller-sa"
  }
}

data "aws_iam_policy_document" "pods_assume" {
  for_each = local.service_accounts

  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]

    principals {
      type        = "Federated"
      identifiers = [aws_iam_openid_connect_provider.eks.arn]
    }

    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:sub"
      values   = ["system:serviceaccount:${each.value}"]
    }

    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "weights" {
  name               = "${var.name}-weights"
  assume_role_policy = data.aws_iam_policy_document.pods_assume["weights"].json
}

resource "aws_iam_role_policy_attachment" "weights" {
  role       = aws_iam_role.weights.name
  policy_arn = aws_iam_policy.read_weights.arn
}
