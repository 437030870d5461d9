variable "region" {
  description = "Where everything is."
  type        = string
  default     = "us-west-2"
}

variable "name" {
  description = "Of the cluster, and the beginning of all other names."
  type        = string
  default     = "quire"
}

variable "kubernetes_version" {
  description = "Of the control plane and the nodes."
  type        = string
  default     = "1.33"
}

variable "weights_bucket" {
  description = "The S3 bucket of the models' weights. It exists already."
  type        = string
}

variable "namespace" {
  description = "Where infra/kubernetes puts Quire."
  type        = string
  default     = "quire"
}

variable "api_access_cidrs" {
  description = "Networks from which the Kubernetes API may be reached."
  type        = list(string)
}

variable "node_groups" {
  description = "Groups of nodes; `pool` is the label that infra/kubernetes/overlays select by."
  type = map(object({
    instance_types = list(string)
    capacity_type  = string
    ami_type       = string
    pool           = string
    gpu            = bool
    disk_gib       = number
    min_size       = number
    max_size       = number
  }))
  default = {
    system = {
      instance_types = ["m7i.xlarge"]
      capacity_type  = "ON_DEMAND"
      ami_type       = "AL2023_x86_64_STANDARD"
      pool           = "system"
      gpu            = false
      disk_gib       = 100
      min_size       = 2
      max_size       = 4
    }
    gpu = {
      instance_types = ["g6e.2xlarge"]
      capacity_type  = "ON_DEMAND"
      ami_type       = "AL2023_x86_64_NVIDIA"
      pool           = "gpu"
      gpu            = true
      disk_gib       = 200
      min_size       = 1
      max_size       = 4
    }
    gpu_spot = {
      instance_types = ["g6e.2xlarge", "g6e.4xlarge"]
      capacity_type  = "SPOT"
      ami_type       = "AL2023_x86_64_NVIDIA"
      pool           = "gpu"
      gpu            = true
      disk_gib       = 200
      min_size       = 0
      max_size       = 8
    }
    gpu_tp = {
      instance_types = ["g6e.12xlarge"]
      capacity_type  = "ON_DEMAND"
      ami_type       = "AL2023_x86_64_NVIDIA"
      pool           = "gpu-tp"
      gpu            = true
      disk_gib       = 500
      min_size       = 0
      max_size       = 2
    }
  }
}
