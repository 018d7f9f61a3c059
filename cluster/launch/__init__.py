"""From `configs/clusters/NAME.yaml` to a running Ray cluster: files to read, and the commands that apply them.

spec           the `provider` section: which cloud, which node groups, which image
release        the Ray and Python that every node gets: those of requirements.lock
vm             a cluster-launcher file, as far as all providers of machines share it
aws            its machines on AWS, and the rights that they need
gcp            its machines on Google Cloud
gcp_provider   Ray's provider for it, without the wide rights that it gives itself
azure          its machines on Azure
azure_provider Ray's provider for it, without the open port that it makes
ssh            its machines over SSH, on premises
kube           RayCluster, RayJob and RayService for KubeRay, with their network policy
container      the container file that every node runs
files          all files of a cluster, and where they are written
token          the cluster's token on this machine
commands       ray and kubectl, run on those files: up, down, status, dashboard
cli            the commands of `luthier cluster` for it
"""
