{{- define "hub.labels" -}}
app.kubernetes.io/name: cellway-hub
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* Secrets that are mounted as folders, by their volumes' names. A release of before has none of these values. */}}
{{- define "hub.secrets" -}}
{{- $files := .Values.files | default dict }}
{{- $stock := .Values.stockApi | default dict }}
{{- $all := dict "cellway-tls" $files.tlsSecret "cellway-client-ca" $files.clientCASecret }}
{{- $own := dict "cellway-encryption" $files.encryptionSecret "cellway-tokens" $files.tokensSecret "cellway-audit" $files.auditPolicySecret }}
{{- if $stock.kubeconfigSecret }}
{{- range $name, $secret := $own }}
{{- if $secret }}
{{- fail (printf "files: the Secret %s is for the hub's own API, and stockApi.kubeconfigSecret names another: leave one of the two out" $secret) }}
{{- end }}
{{- end }}
{{- if (.Values.store).existingSecret }}
{{- fail "store.existingSecret is for the hub's own API, and stockApi.kubeconfigSecret names another: leave one of the two out" }}
{{- end }}
{{- end }}
{{- $all = merge $all $own (dict "cellway-kubeconfig" $stock.kubeconfigSecret) }}
{{- $used := dict }}
{{- range $name, $secret := $all }}
{{- if $secret }}
{{- $_ := set $used $name $secret }}
{{- end }}
{{- end }}
{{- toYaml $used }}
{{- end }}

{{- /* Of the conversion webhook, with defaults for a release of before. */}}
{{- define "hub.webhookPort" -}}
{{ ((.Values.stockApi).webhook).port | default 9443 }}
{{- end }}

{{- define "hub.selector" -}}
app.kubernetes.io/name: cellway-hub
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
