// BentoML's copy of Swagger UI, without the tracking script of BentoML's own page.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#page" });
