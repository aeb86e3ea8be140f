{{- /* Makes and renews certificates, of (release, service account). */ -}}
{{- define "raddle.certificatesPod" -}}
{{- $ := index . 0 -}}
{{- include "raddle.scheduling" (list $ $.Values.scheduler) | trim }}
serviceAccountName: {{ index . 1 }}
automountServiceAccountToken: true
enableServiceLinks: false
restartPolicy: Never
securityContext:
  {{- include "raddle.podSecurity" $ | nindent 2 }}
containers:
  - name: certificates
    image: {{ include "raddle.image" (list $ $.Values.image) }}
    imagePullPolicy: {{ $.Values.image.pullPolicy }}
    command:
      - raddle
      - certificates
      - kubernetes
      - --namespace={{ $.Release.Namespace }}
      - --release={{ include "raddle.name" $ }}
      - --days={{ $.Values.certificates.days }}
      - --renew-before-days={{ $.Values.certificates.renewBeforeDays }}
      {{- if $.Values.etcd.enabled }}
      {{- range include "raddle.etcdHosts" $ | fromJsonArray }}
      - --etcd-host={{ . }}
      {{- end }}
      {{- end }}
    resources:
      requests: {cpu: 50m, memory: 64Mi}
      limits: {memory: 256Mi}
    securityContext:
      {{- include "raddle.containerSecurity" $ | nindent 6 }}
{{- end }}
{{- define "raddle.certificateSecrets" -}}
{{- range list "ca" "scheduler" "agent" "operator" "admin" "rank" "frontdoor" "etcd" }}
- {{ include "raddle.name" $ }}-tls-{{ . }}
{{- end }}
{{- end }}
