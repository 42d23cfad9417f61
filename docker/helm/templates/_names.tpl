{{- define "gsx.name" -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "gsx.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gsx.labels" -}}
{{ include "gsx.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "gsx.repository" -}}
{{- if .Values.store.address -}}
{{ .Values.store.address }}
{{- else -}}
/models
{{- end -}}
{{- end -}}

{{- /* The series of this release's replicas in Prometheus. */ -}}
{{- define "gsx.series" -}}
{{ printf "{namespace=%q,pod=~\"%s-.*\",model=%q}" .Release.Namespace (include "gsx.name" .) .Values.model }}
{{- end -}}
