{{/* Names and labels that all objects of a release share. */}}
{{- define "specattn.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "specattn.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "specattn.release" . }}
{{- end -}}

{{- define "specattn.release" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What every container may do: nothing that it need not. */}}
{{- define "specattn.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "specattn.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Where a pod runs, from its role's values. */}}
{{- define "specattn.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The Secret with what the parts know each other and clients by. */}}
{{- define "specattn.credentials" -}}
{{- .Values.security.existingSecret | default (printf "%s-credentials" (include "specattn.name" .)) -}}
{{- end -}}

{{- define "specattn.scheme" -}}
{{- if .Values.security.tls.secret }}https{{ else }}http{{ end -}}
{{- end -}}

{{- define "specattn.dns" -}}
{{- if .Values.security.tls.secret }}dns+https{{ else }}dns{{ end -}}
{{- end -}}

{{/* Flags of every service. */}}
{{- define "specattn.securityArgs" -}}
{{- if .Values.security.tls.secret }}
- --tls-cert=/etc/specattn/tls/tls.crt
- --tls-key=/etc/specattn/tls/tls.key
- --tls-ca=/etc/specattn/tls/ca.crt
- --tls-server-name={{ .Values.security.tls.serverName }}
{{- end }}
{{- if .Values.security.publicMetrics }}
- --public-metrics
{{- end }}
{{- end -}}

{{/* Environment of the health command, which speaks TLS where Kubernetes' gRPC probe cannot. */}}
{{- define "specattn.healthEnv" -}}
{{- if .Values.security.tls.secret }}
- {name: SPECATTN_TLS_CERT, value: /etc/specattn/tls/tls.crt}
- {name: SPECATTN_TLS_KEY, value: /etc/specattn/tls/tls.key}
- {name: SPECATTN_TLS_CA, value: /etc/specattn/tls/ca.crt}
- {name: SPECATTN_TLS_SERVER_NAME, value: {{ .Values.security.tls.serverName }}}
{{- end }}
{{- end -}}

{{/* What a probe does; takes a list of the root and the port. */}}
{{- define "specattn.probe" -}}
{{- $root := index . 0 -}}
{{- $port := index . 1 -}}
{{- if $root.Values.security.tls.secret -}}
exec: {command: [specattn, health, "https://127.0.0.1:{{ $port }}"]}
timeoutSeconds: 5
{{- else -}}
grpc: {port: {{ $port }}}
{{- end -}}
{{- end -}}

{{- define "specattn.securityMounts" -}}
- {name: credentials, mountPath: /etc/specattn/credentials, readOnly: true}
{{- if .Values.security.tls.secret }}
- {name: tls, mountPath: /etc/specattn/tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* A pod gets what its role needs and no more; takes a list of the root and the keys. */}}
{{- define "specattn.securityVolumes" -}}
{{- $root := index . 0 -}}
- name: credentials
  secret:
    secretName: {{ include "specattn.credentials" $root }}
    items:
      {{- range index . 1 }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
{{- with $root.Values.security.tls.secret }}
- name: tls
  secret: {secretName: {{ . }}}
{{- end }}
{{- end -}}
