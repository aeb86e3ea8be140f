"""Command lines and configuration of the servers of a cluster. Pure: it only writes text.

Networks: machines have 10.200.0.0/24 (the control plane .1, node N .10+N), pods of node N have
10.201.N.0/24, Services 10.202.0.0/16. They exist inside the cluster's namespaces only.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path

CONTROL_PLANE_ADDRESS = "10.200.0.1"
SERVICES = "10.202.0.0/16"
PODS = "10.201.0.0/16"
DOMAIN = "cluster.local"
ISSUER = f"https://kubernetes.default.svc.{DOMAIN}"
PAUSE_IMAGE = "localhost/raddle-pause:dev"
#: The servers make this folder; the usual one lies on the machine, which is read-only for them.
VOLUME_PLUGINS = "/var/lib/kubelet/volume-plugins"
#: Names by which pods and people reach the API server.
API_SERVER_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    f"kubernetes.default.svc.{DOMAIN}",
    "localhost",
    "127.0.0.1",
    CONTROL_PLANE_ADDRESS,
    "10.202.0.1",
)


def node_address(number: int) -> str:
    return f"10.200.0.{10 + number}"


def node_pods(number: int) -> str:
    return f"10.201.{number}.0/24"


def etcd(binary: Path, data: Path, client_port: int = 2379, peer_port: int = 2380) -> list[str]:
    """One member on loopback. It may lose data with the machine: a test's cluster goes with it."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        str(binary),
        f"--data-dir={data}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def api_server(tools: Path, pki: Path, port: int = 6443, etcd_port: int = 2379) -> list[str]:
    """What an API server needs with or without nodes."""
    return [
        str(tools / "kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--secure-port={port}",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        f"--service-cluster-ip-range={SERVICES}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={pki}/service-accounts.pub",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        "--allow-privileged=true",
    ]


def api_server_for_nodes(tools: Path, pki: Path) -> list[str]:
    return [
        *api_server(tools, pki),
        "--bind-address=0.0.0.0",
        f"--advertise-address={CONTROL_PLANE_ADDRESS}",
        f"--kubelet-client-certificate={pki}/kubelet-client.crt",
        f"--kubelet-client-key={pki}/kubelet-client.key",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
    ]


def api_server_alone(tools: Path, pki: Path, port: int, etcd_port: int) -> list[str]:
    """On loopback. Without the reconciler of endpoints, which refuses a loopback address."""
    return [
        *api_server(tools, pki, port, etcd_port),
        "--bind-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
    ]


def controller_manager(tools: Path, pki: Path) -> list[str]:
    """The rates are raised: else a new namespace waits 5 s for its default ServiceAccount."""
    return [
        str(tools / "kube-controller-manager"),
        f"--kubeconfig={pki}/controller-manager.kubeconfig",
        f"--service-account-private-key-file={pki}/service-accounts.key",
        f"--root-ca-file={pki}/ca.crt",
        f"--cluster-signing-cert-file={pki}/ca.crt",
        f"--cluster-signing-key-file={pki}/ca.key",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        f"--flex-volume-plugin-dir={VOLUME_PLUGINS}",
    ]


def scheduler(tools: Path, pki: Path) -> list[str]:
    return [
        str(tools / "kube-scheduler"),
        f"--kubeconfig={pki}/scheduler.kubeconfig",
        "--leader-elect=false",
    ]


def corefile(pki: Path) -> str:
    """CoreDNS answers for Services only; the cluster has no way out to other names."""
    return f"""\
.:53 {{
  bind {CONTROL_PLANE_ADDRESS}
  errors
  health 127.0.0.1:8080
  kubernetes {DOMAIN} in-addr.arpa {{
    kubeconfig {pki}/dns.kubeconfig
    pods insecure
    ttl 1
  }}
  cache 1
}}
"""


def containerd_config(cni: Path) -> str:
    """For a root without CAP_SYS_RESOURCE: OOM scores are left alone."""
    return f"""\
version = 2
oom_score = 0
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
"""


def cni_config(number: int) -> str:
    """Pods of a node hang on a bridge; the routes between nodes are static."""
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": node_pods(number)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": addresses,
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]})


def kubelet_config(pki: Path, name: str) -> str:
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": f"{pki}/ca.crt"},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{pki}/{name}.crt",
            "tlsPrivateKeyFile": f"{pki}/{name}.key",
            "clusterDomain": DOMAIN,
            "clusterDNS": [CONTROL_PLANE_ADDRESS],
            "resolvConf": "/etc/resolv.conf",
            "volumePluginDir": VOLUME_PLUGINS,
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "maxOpenFiles": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            # The disk and the memory are the machine's: no node evicts or collects for them.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {
                "memory.available": "0%",
                "nodefs.available": "0%",
                "nodefs.inodesFree": "0%",
                "imagefs.available": "0%",
            },
        }
    )


def kubelet(tools: Path, pki: Path, config: Path, name: str, address: str) -> list[str]:
    return [
        str(tools / "kubelet"),
        f"--config={config}",
        f"--kubeconfig={pki}/{name}.kubeconfig",
        f"--hostname-override={name}",
        f"--node-ip={address}",
    ]


def proxy_config(pki: Path, name: str, address: str) -> str:
    """Settings of connection tracking are the machine's: zero leaves them alone."""
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": f"{pki}/proxy.kubeconfig"},
            "mode": "iptables",
            "clusterCIDR": PODS,
            "hostnameOverride": name,
            "bindAddress": address,
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "oomScoreAdj": 0,
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
        }
    )
