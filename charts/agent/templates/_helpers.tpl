{{- define "agent.labels" -}}
app.kubernetes.io/name: cellway-agent
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "agent.selector" -}}
app.kubernetes.io/name: cellway-agent
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "agent.serviceAccount" -}}
{{- if .Values.serviceAccount.name }}{{ .Values.serviceAccount.name }}
{{- else if .Values.serviceAccount.create }}{{ .Release.Name }}
{{- else }}default
{{- end }}
{{- end }}

{{- define "agent.secret" -}}
{{- .Values.enrolment.existingSecret | default (printf "%s-enrolment" .Release.Name) }}
{{- end }}

{{- /* Cluster-wide names: two releases in two namespaces must not share them. */}}
{{- define "agent.clusterWide" -}}
{{- printf "%s-%s" .Release.Namespace .Release.Name }}
{{- end }}
