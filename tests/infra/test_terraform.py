"""infra/aws/terraform parses, and what it refers to is declared; a mistake is caught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.infra.terraform import terraform_problems

FOLDER = Path(__file__).parents[2] / "infra" / "aws" / "terraform"


def test_the_folder() -> None:
    assert terraform_problems(FOLDER) == []


@pytest.mark.parametrize(
    ("file", "right", "wrong", "problem"),
    [
        ("vpc.tf", 'resource "aws_vpc" "this" {', 'resource "aws_vpc" "this"', "vpc.tf: "),
        ("vpc.tf", "aws_vpc.this.id", "aws_vpc.main.id", "aws_vpc.main is not declared"),
        ("eks.tf", "var.kubernetes_version", "var.version", "var.version is not declared"),
        ("eks.tf", "data.aws_iam_policy_document.eks", "data.aws_iam_policy_document.ek", "_assume is not declared"),
        ("weights.tf", "${local.issuer}:aud", "${local.isuer}:aud", "local.isuer is not declared"),
        ("weights.tf", "${var.namespace}", "quire", "var.namespace is never used"),
        ("outputs.tf", "aws_iam_role.weights.arn", "aws_iam_role.weight.arn", "aws_iam_role.weight is not declared"),
        (
            "node_groups.tf",
            '"aws_iam_role" "node"',
            '"aws_iam_role" "cluster"',
            "cluster is declared twice",
        ),
        ("versions.tf", "required_providers", "needed_providers", "no provider is pinned"),
        ("variables.tf", 'description = "Where everything is."', "", "has no description"),
    ],
)
def test_a_mistake_is_caught(tmp_path: Path, file: str, right: str, wrong: str, problem: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "terraform")
    path = tmp_path / "terraform" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong, 1))
    found = terraform_problems(path.parent)
    assert any(problem in each for each in found), found


def test_pods_may_only_read_the_bucket() -> None:
    text = (FOLDER / "weights.tf").read_text()
    assert {part.split('"')[0] for part in text.split('"s3:')[1:]} == {"ListBucket", "GetObject"}
