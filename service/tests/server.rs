//! The server around a service: health, reflection, drain.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use specattn_service::channel;
use specattn_service::server::{Server, ServerConfig};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

/// An empty server with a short grace period; its URI, its token, and its end.
async fn start() -> (
    String,
    CancellationToken,
    tokio::task::JoinHandle<Result<(), specattn_service::ServiceError>>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = ServerConfig {
        drain_timeout: Duration::from_millis(200),
        ..ServerConfig::default()
    };
    let uri = config.endpoint(&listener).unwrap();
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    let server = tokio::spawn(async move { Server::new().serve(listener, &config, token).await });
    (uri, shutdown, server)
}

#[tokio::test]
async fn health_turns_and_watchers_are_cut_after_the_grace_period() {
    let (uri, shutdown, server) = start().await;
    let mut client = HealthClient::new(channel::connect(&uri).await.unwrap());
    let mut watch = client
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
    shutdown.cancel();
    let second = watch.message().await.unwrap().unwrap();
    assert_eq!(second.status(), ServingStatus::NotServing);
    // The watch never ends by itself: only the cut ends it.
    assert!(!matches!(watch.message().await, Ok(Some(_))));
    let ended = tokio::time::timeout(Duration::from_secs(5), server).await;
    ended.expect("the drain ends").unwrap().unwrap();
    assert!(channel::connect(&uri).await.is_err());
}

#[tokio::test]
async fn reflection_lists_the_services() {
    let (uri, shutdown, server) = start().await;
    let mut client = ServerReflectionClient::new(channel::connect(&uri).await.unwrap());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answer: ServerReflectionResponse = client
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap()
        .into_inner()
        .message()
        .await
        .unwrap()
        .unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("no list: {answer:?}");
    };
    let names: Vec<_> = list.service.iter().map(|s| s.name.as_str()).collect();
    assert!(names.contains(&"specattn.v1.VerifyService"), "{names:?}");
    drop(client);
    shutdown.cancel();
    server.await.unwrap().unwrap();
}
