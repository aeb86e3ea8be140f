{{/* (list $ restartPolicy): a pod that runs one command of `raddle` as the administrator. */}}
{{- define "raddle.commandPod" -}}
{{- $ := index . 0 }}
{{- include "raddle.scheduling" (list $ $.Values.scheduler) | trim }}
automountServiceAccountToken: false
enableServiceLinks: false
restartPolicy: {{ index . 1 }}
securityContext:
  {{- include "raddle.podSecurity" $ | nindent 2 }}
{{- end }}

{{- define "raddle.commandContainer" -}}
image: {{ include "raddle.image" (list . .Values.image) }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
env:
  {{- include "raddle.variable" (list "RADDLE_CONFIG" "/etc/raddle/scheduler/cli.yaml") | nindent 2 }}
resources:
  requests: {cpu: 50m, memory: 64Mi}
  limits: {memory: 256Mi}
securityContext:
  {{- include "raddle.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: tls, mountPath: /etc/raddle/tls, readOnly: true}
  - {name: configuration, mountPath: /etc/raddle/scheduler, readOnly: true}
{{- end }}

{{- define "raddle.commandVolumes" -}}
{{ include "raddle.tlsVolumes" (list . "admin") }}
- name: configuration
  configMap: {name: {{ include "raddle.name" . }}-scheduler}
{{- end }}
