{{- define "pretrain.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- /* At most 40 characters, so that the longest suffix stays within a label's 63. */}}
{{- define "pretrain.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "pretrain.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "pretrain.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "pretrain.selectorLabels" -}}
app.kubernetes.io/name: {{ include "pretrain.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pretrain.labels" -}}
{{ include "pretrain.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{- end }}

{{- define "pretrain.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "pretrain.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "pretrain.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "pretrain.agentsService" -}}{{ include "pretrain.fullname" . }}-agents{{- end }}

{{- /* The name that worker pods connect to, and the first of the certificate's. */}}
{{- define "pretrain.agentsHost" -}}{{ include "pretrain.agentsService" . }}.{{ .Release.Namespace }}.svc{{- end }}

{{- define "pretrain.hosts" -}}
{{- $host := include "pretrain.agentsHost" . -}}
{{- list $host (printf "%s.cluster.local" $host) (printf "%s.%s" (include "pretrain.agentsService" .) .Release.Namespace) (include "pretrain.agentsService" .) | toJson }}
{{- end }}

{{- define "pretrain.tlsSecret" -}}{{ .Values.tls.secretName | default (printf "%s-tls" (include "pretrain.fullname" .)) }}{{- end }}

{{- /* The operator's own variables, less those that the user gives: a name twice is an error in Helm 4. */}}
{{- define "pretrain.env" -}}
{{- $given := dict }}
{{- range .Values.env }}{{ $_ := set $given .name true }}{{ end }}
{{- $own := list
  (dict "name" "POD_NAME" "valueFrom" (dict "fieldRef" (dict "fieldPath" "metadata.name")))
  (dict "name" "POD_NAMESPACE" "valueFrom" (dict "fieldRef" (dict "fieldPath" "metadata.namespace")))
  (dict "name" "POD_IP" "valueFrom" (dict "fieldRef" (dict "fieldPath" "status.podIP"))) }}
{{- $all := list }}
{{- range $own }}{{ if not (hasKey $given .name) }}{{ $all = append $all . }}{{ end }}{{ end }}
{{- concat $all .Values.env | toYaml }}
{{- end }}
