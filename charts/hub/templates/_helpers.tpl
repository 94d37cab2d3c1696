{{- define "hub.labels" -}}
app.kubernetes.io/name: cellway-hub
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "hub.selector" -}}
app.kubernetes.io/name: cellway-hub
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
