{{/* Prefix of all names; the longest suffix leaves it within 63 characters. */}}
{{- define "raddle.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "raddle.selector" -}}
app.kubernetes.io/name: raddle
app.kubernetes.io/instance: {{ include "raddle.name" . }}
{{- end }}

{{- define "raddle.labels" -}}
{{ include "raddle.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* (list $ image): registry, repository, digest or tag. */}}
{{- define "raddle.image" -}}
{{- $ := index . 0 }}{{ $image := index . 1 }}
{{- with $.Values.global.imageRegistry }}{{ trimSuffix "/" . }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $.Values.image.tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}

{{/* Restricted pods: the whole of the Pod Security standard. */}}
{{- define "raddle.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "raddle.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* (list $ values): where a pod runs, and what it is pulled with. */}}
{{- define "raddle.scheduling" -}}
{{- $ := index . 0 }}{{ $values := index . 1 }}
{{- with $.Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
nodeSelector:
  {{- merge (dict "kubernetes.io/os" "linux") $values.nodeSelector | toYaml | nindent 2 }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* (list $ component affinity): the given one, or a node for each replica where there are enough. */}}
{{- define "raddle.affinity" -}}
{{- $ := index . 0 }}
{{- if index . 2 }}
{{- toYaml (index . 2) }}
{{- else }}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "raddle.selector" $ | nindent 12 }}
            app.kubernetes.io/component: {{ index . 1 }}
{{- end }}
{{- end }}

{{- define "raddle.cluster" -}}
{{ .Values.cluster | default (printf "%s-%s" .Release.Namespace .Release.Name) }}
{{- end }}

{{- define "raddle.etcdHost" -}}
{{ include "raddle.name" . }}-etcd.{{ .Release.Namespace }}.svc
{{- end }}

{{/* All names that etcd's certificate carries. */}}
{{- define "raddle.etcdHosts" -}}
{{- $short := printf "%s-etcd" (include "raddle.name" .) }}
{{- $space := printf "%s.%s" $short .Release.Namespace }}
{{- list $short $space (printf "%s.svc" $space) (printf "%s.svc.%s" $space .Values.clusterDomain) | toJson }}
{{- end }}

{{- define "raddle.hostPath" -}}
{{ .Values.agent.hostPath | default (printf "/var/lib/raddle/%s-%s" .Release.Namespace (include "raddle.name" .)) }}
{{- end }}

{{/* How ranks run: without an operator nobody makes pods for them. */}}
{{- define "raddle.ranks" -}}
{{ if and .Values.operator.enabled (not .Values.ranks.inAgent) }}pods{{ else }}processes{{ end }}
{{- end }}

{{/* (list name value): a variable, always text. */}}
{{- define "raddle.variable" -}}
- name: {{ index . 0 }}
  value: {{ index . 1 | toString | quote }}
{{- end }}

{{/* Names of this pod that settings refer to. */}}
{{- define "raddle.podVariables" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{/* (list prefix map): settings by name as a daemon's environment. */}}
{{- define "raddle.settings" -}}
{{- $prefix := index . 0 }}
{{- range $name, $value := index . 1 }}
{{ include "raddle.variable" (list (printf "%s_%s" $prefix (upper $name)) (kindIs "slice" $value | ternary (join "," $value) $value)) }}
{{- end }}
{{- end }}

{{/* (list $ prefix): certificates of a daemon. */}}
{{- define "raddle.tlsVariables" -}}
{{- $prefix := index . 1 -}}
{{ include "raddle.variable" (list (printf "%s_TLS_CA" $prefix) "/etc/raddle/tls/ca.crt") }}
{{ include "raddle.variable" (list (printf "%s_TLS_CERTIFICATE" $prefix) "/etc/raddle/tls/tls.crt") }}
{{ include "raddle.variable" (list (printf "%s_TLS_KEY" $prefix) "/etc/raddle/tls/tls.key") }}
{{- end }}

{{/* (list $ prefix): the store as schedulers and agents reach it. */}}
{{- define "raddle.etcdVariables" -}}
{{- $ := index . 0 }}{{ $prefix := index . 1 }}{{ $folder := "/etc/raddle/tls" }}
{{- $external := $.Values.etcd.external }}
{{- if $.Values.etcd.enabled -}}
{{ include "raddle.variable" (list (printf "%s_ETCD" $prefix) (printf "%s:2379" (include "raddle.etcdHost" $))) }}
{{- else -}}
{{- $folder = "/etc/raddle/etcd" -}}
{{ include "raddle.variable" (list (printf "%s_ETCD" $prefix) (join "," $external.endpoints)) }}
{{- end }}
{{ include "raddle.variable" (list (printf "%s_CLUSTER" $prefix) (include "raddle.cluster" $)) }}
{{- if or $.Values.etcd.enabled (not $external.insecure) }}
{{ include "raddle.variable" (list (printf "%s_ETCD_CA" $prefix) (printf "%s/ca.crt" $folder)) }}
{{ include "raddle.variable" (list (printf "%s_ETCD_CERTIFICATE" $prefix) (printf "%s/tls.crt" $folder)) }}
{{ include "raddle.variable" (list (printf "%s_ETCD_KEY" $prefix) (printf "%s/tls.key" $folder)) }}
{{- end }}
{{- end }}

{{/* (list $ who): the volume with an identity's certificate, and etcd's if that is another one. */}}
{{- define "raddle.tlsVolumes" -}}
{{- $ := index . 0 -}}
- name: tls
  secret: {secretName: {{ include "raddle.name" $ }}-tls-{{ index . 1 }}, defaultMode: 0440}
{{- end }}

{{- define "raddle.etcdVolumes" -}}
{{- if and (not .Values.etcd.enabled) (not .Values.etcd.external.insecure) }}
- name: etcd
  secret: {secretName: {{ .Values.etcd.external.tlsSecret }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "raddle.etcdMounts" -}}
{{- if and (not .Values.etcd.enabled) (not .Values.etcd.external.insecure) }}
- {name: etcd, mountPath: /etc/raddle/etcd, readOnly: true}
{{- end }}
{{- end }}

{{/* (list $ component annotations [more labels]): a pod's metadata. */}}
{{- define "raddle.podMetadata" -}}
{{- $ := index . 0 -}}
labels:
  {{- include "raddle.labels" $ | nindent 2 }}
  app.kubernetes.io/component: {{ index . 1 }}
  {{- if gt (len .) 3 }}
  {{- toYaml (index . 3) | nindent 2 }}
  {{- end }}
{{- with index . 2 }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* (list setting API) -> "true" where a resource of another project is wanted and can be had. */}}
{{- define "raddle.wants" -}}
{{- $ := index . 0 }}{{ $setting := index . 1 | toString }}
{{- if or (eq $setting "true") (and (eq $setting "auto") ($.Capabilities.APIVersions.Has (index . 2))) }}true{{ end }}
{{- end }}

{{/* A map as key=value,key=value. */}}
{{- define "raddle.pairs" -}}
{{- $pairs := list }}
{{- range $key, $value := . }}{{ $pairs = append $pairs (printf "%s=%s" $key $value) }}{{ end }}
{{- join "," $pairs }}
{{- end }}

{{/* Taints that agents, of whatever pool, tolerate, as key or key:effect: these are no cordon. */}}
{{- define "raddle.toleratedTaints" -}}
{{- $taints := list }}
{{- range prepend .Values.agent.pools .Values.agent }}
{{- range .tolerations }}
{{- $taints = append $taints (join ":" (compact (list (.key | default "*") .effect))) }}
{{- end }}
{{- end }}
{{- uniq $taints | join "," }}
{{- end }}

{{/* Namespaces whose jobs are served, one a line; "*" for all. */}}
{{- define "raddle.namespaces" -}}
{{ .Values.operator.namespaces | default (list .Release.Namespace) | uniq | toJson }}
{{- end }}

{{/* "true" if claims without a class find one; empty too where the cluster cannot be asked. */}}
{{- define "raddle.defaultStorageClass" -}}
{{- range (lookup "storage.k8s.io/v1" "StorageClass" "" "").items }}
{{- if eq (dig "metadata" "annotations" "storageclass.kubernetes.io/is-default-class" "" .) "true" }}true{{ end }}
{{- end }}
{{- end }}
