# Roles of the instances that infra/aws/cluster.yaml starts, which need no EKS.

resource "aws_iam_role" "ray" {
  for_each           = toset(["head", "worker"])
  name               = "${var.name}-ray-${each.value}"
  assume_role_policy = data.aws_iam_policy_document.ec2_assume.json
}

resource "aws_iam_instance_profile" "ray" {
  for_each = aws_iam_role.ray
  name     = each.value.name
  role     = each.value.name
}

resource "aws_iam_role_policy_attachment" "ray_weights" {
  for_each   = aws_iam_role.ray
  role       = each.value.name
  policy_arn = aws_iam_policy.read_weights.arn
}

data "aws_caller_identity" "current" {}

data "aws_iam_policy_document" "ray_keys" {
  statement {
    actions   = ["ssm:GetParameter"]
    resources = ["arn:aws:ssm:${var.region}:${data.aws_caller_identity.current.account_id}:parameter/quire/*"]
  }
}

resource "aws_iam_role_policy" "ray_keys" {
  for_each = aws_iam_role.ray
  name     = "read-api-keys"
  role     = each.value.name
  policy   = data.aws_iam_policy_document.ray_keys.json
}

# The head starts and ends the others.
data "aws_iam_policy_document" "ray_head" {
  statement {
    actions = [
      "ec2:CreateTags",
      "ec2:DescribeInstances",
      "ec2:DescribeInstanceTypes",
      "ec2:DescribeSecurityGroups",
      "ec2:DescribeSubnets",
      "ec2:RunInstances",
      "ec2:TerminateInstances",
    ]
    resources = ["*"]
  }

  statement {
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.ray["worker"].arn]
  }
}

resource "aws_iam_role_policy" "ray_head" {
  name   = "start-workers"
  role   = aws_iam_role.ray["head"].name
  policy = data.aws_iam_policy_document.ray_head.json
}
