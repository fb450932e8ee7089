//! [`ApiError`]: failures in the shape that OpenAI clients read.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use specattn_proto::Fault;
use specattn_proto::validate::Invalid;

/// A failed request.
#[derive(Debug)]
pub(crate) struct ApiError {
    fault: Fault,
    /// The field that is wrong, where one is.
    param: Option<&'static str>,
    code: Option<&'static str>,
    /// Where the transport says more than the fault.
    status: Option<StatusCode>,
}

impl ApiError {
    /// A field that may not be what it is.
    pub(super) fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self {
            param: Some(param),
            ..Fault::InvalidArgument(message.into()).into()
        }
    }

    /// A model that is not served here.
    pub(super) fn unknown_model(name: &str, known: &[String]) -> Self {
        let message = format!(
            "the model {name:?} does not exist here; there is {}",
            known.join(", ")
        );
        Self {
            param: Some("model"),
            code: Some("model_not_found"),
            ..Fault::NotFound(message).into()
        }
    }

    /// A request whose body did not come in time.
    pub(super) fn late() -> Self {
        Self {
            status: Some(StatusCode::REQUEST_TIMEOUT),
            ..Fault::DeadlineExceeded("the request's body did not come in time".to_owned()).into()
        }
    }

    fn status(&self) -> StatusCode {
        self.status.unwrap_or(match &self.fault {
            Fault::InvalidArgument(_) | Fault::FailedPrecondition(_) => StatusCode::BAD_REQUEST,
            Fault::NotFound(_) => StatusCode::NOT_FOUND,
            Fault::AlreadyExists(_) => StatusCode::CONFLICT,
            Fault::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Fault::PermissionDenied(_) => StatusCode::FORBIDDEN,
            Fault::ResourceExhausted { .. } => StatusCode::TOO_MANY_REQUESTS,
            Fault::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Fault::DeadlineExceeded(_) => StatusCode::GATEWAY_TIMEOUT,
            Fault::Cancelled(_) => StatusCode::CONFLICT,
            Fault::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        })
    }

    /// The body that says so.
    pub(super) fn body(&self) -> Value {
        let kind = match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {
            "message": self.fault.to_string(),
            "type": kind,
            "param": self.param,
            "code": self.code.unwrap_or(code_of(&self.fault)),
        }})
    }
}

/// OpenAI's own name of a failure where it has one that clients look for, else ours.
fn code_of(fault: &Fault) -> &'static str {
    match fault {
        Fault::Unauthenticated(_) => "invalid_api_key",
        fault => fault.label(),
    }
}

impl From<Fault> for ApiError {
    fn from(fault: Fault) -> Self {
        Self {
            fault,
            param: None,
            code: None,
            status: None,
        }
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        Self::invalid(invalid.field, invalid.to_string())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        // Axum answers a field of the wrong type with 422, OpenAI with 400.
        let status = match rejection.status() {
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            other => other,
        };
        Self {
            status: Some(status),
            ..Fault::InvalidArgument(rejection.body_text()).into()
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        if let Fault::ResourceExhausted {
            retry_after: Some(after),
            ..
        } = &self.fault
        {
            let seconds = after.as_secs_f64().ceil().max(1.0);
            if let Ok(value) = HeaderValue::from_str(&format!("{seconds:.0}")) {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
        }
        response
    }
}
